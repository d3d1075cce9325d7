"""raysynth: synthetic, labelled lung CT, made and judged on a Ray cluster. Research use only."""

__version__ = "0.1.0"
