"""The command: `tilepipe`, or `python -m tilepipe`."""

from tilepipe.allocator import start_keeping


def main() -> None:
    """Runs the command line."""
    start_keeping()
    from tilepipe.cli import main as run

    run()


if __name__ == "__main__":
    main()
