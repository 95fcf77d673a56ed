"""vibechat: a ChatGPT-like language model from nothing, at measured speed."""

__version__ = "0.1.0"
