"""Small trained models that come with the package, in stock Hugging Face architectures, and their data.

``zoo.names()`` lists them, ``zoo.load(name)`` is the model, ``zoo.card(name)`` says what it was trained on,
how, and what it scores. One module per kind of data, pure functions of a ``torch.Generator``.
"""

from tokencomp.zoo import digits, recall, text
from tokencomp.zoo.base import card, load, names

__all__ = ["card", "digits", "load", "names", "recall", "text"]
