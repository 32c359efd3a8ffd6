"""`python -m finetune`, and `accelerate launch -m finetune`."""

import sys

from finetune.cli.commands import main

sys.exit(main())
