"""Import first: puts the checkout that a script belongs to on the path, so that it runs from any directory."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
