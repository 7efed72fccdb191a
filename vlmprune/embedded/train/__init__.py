"""Training of the embedded models. Run `python -m vlmprune.embedded.train --help`."""
