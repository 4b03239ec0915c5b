"""`python -m tilepipe`: the command line."""

from tilepipe.cli import main

if __name__ == "__main__":
    main()
