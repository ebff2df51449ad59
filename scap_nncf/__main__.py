# SPDX-License-Identifier: Apache-2.0
"""`python -m scap_nncf` is the command `scap-nncf`."""

import sys

from scap_nncf.cli import main

sys.exit(main())
