"""What all that ``tokencomp.compress`` gives has in common: the model goes back as it was, once."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import TypeVar

Own = TypeVar("Own", bound="Restoring")


class Restoring(ABC):
    """A model that was changed. A context manager: leaving it, also by an exception, restores the model."""

    _removed = False

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Give the model back as it was. Doing it again does nothing."""
        if not self._removed:
            self._restore()
            self._removed = True

    @abstractmethod
    def _restore(self) -> None:
        """What ``remove`` does, once."""
