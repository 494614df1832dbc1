"""The tokenizers of the text tests."""

from support.tokenizers import real, real_folder, tiny, tiny_folder

__all__ = ["real", "real_folder", "tiny", "tiny_folder"]
