"""Train inside a NeMo-RL container or checkout, like its own examples.

    python recipes/run_mopd.py --config configs/nemo/FILE.yaml [KEY=VALUE]...
    python recipes/run_mopd.py --resume RUN_DIR

It is `mopd train` without an installation of this package (docs/nemo.md).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mopd_nemo.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
