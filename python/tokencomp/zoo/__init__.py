"""Small trained models that come with the package, in stock Hugging Face architectures, and their data.

``zoo.names()`` lists them, ``zoo.load(name)`` is the model and what it is judged on, ``zoo.card(name)``
says what it was trained on, how, and what it scores. One module per kind of data, pure functions of a
``torch.Generator``, and ``zoo.tasks``, which draws samples from them and scores models.
"""

from tokencomp.zoo import digits, recall, tasks, text
from tokencomp.zoo.base import card, load, names

__all__ = ["card", "digits", "load", "names", "recall", "tasks", "text"]
