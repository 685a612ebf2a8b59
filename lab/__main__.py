"""`python -m lab`: the laboratory's command line."""

from .cli import main

if __name__ == "__main__":
    main()
