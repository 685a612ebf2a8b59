"""`python -m ummrm`: the command line, with a clear error where its libraries are not installed."""

import sys

try:
    from .cli import main
except ModuleNotFoundError as error:
    library = (error.name or "").partition(".")[0]
    if library in ("typer", "rich", "yaml"):
        sys.exit(f"error: the command line needs {library}; pip install 'ummrm[cli]'")
    raise

if __name__ == "__main__":
    main()
