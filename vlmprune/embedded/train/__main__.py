"""Entry point of `python -m vlmprune.embedded.train`."""

from .cli import main

if __name__ == "__main__":
    main()
