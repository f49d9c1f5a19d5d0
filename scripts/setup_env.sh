# Source it from the root: makes a virtual environment in $CM_VENV (default .venv) with pinned versions, and activates
# it. Arguments: extras of setup.py. An environment that already has this package's pins is used as it is.
CM_VENV=${CM_VENV:-.venv}
stamp="$CM_VENV/.cm-$(cat setup.py scripts/constraints.txt <(echo "$*") | cksum | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
  python=$(command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3) || {
    echo "error: Python 3.11 or newer is needed" >&2
    exit 2
  }
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: Python 3.11 or newer is needed, $python is $("$python" --version)" >&2
    exit 2
  }
  echo "installing into $CM_VENV (once)"
  "$python" -m venv "$CM_VENV"
  pip_install() { "$CM_VENV/bin/pip" install --quiet --disable-pip-version-check -c scripts/constraints.txt "$@"; }
  if ! command -v nvidia-smi >/dev/null; then
    # No GPU: take the CPU build of torch, which is a tenth of the size. Where the package index at hand already
    # offers it under the same version, nothing else is asked.
    report=$("$CM_VENV/bin/pip" install --quiet --disable-pip-version-check --dry-run --no-deps --report - \
      -c scripts/constraints.txt torch 2>/dev/null || true)
    case "$(uname -s)$report" in
      Linux*+cpu*) ;;
      Linux*) pip_install --index-url https://download.pytorch.org/whl/cpu torch torchvision || true ;;
    esac
  fi
  # One command, so that pip chooses a torchvision that fits torch.
  extras=$(IFS=,; echo "$*")
  pip_install torch torchvision
  pip_install -e ".[$extras]"
  touch "$stamp"
fi
. "$CM_VENV/bin/activate"
