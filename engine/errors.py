"""Every error a user can cause. Each message names what was found, what was expected and what to do."""

from __future__ import annotations

from pathlib import Path


class FluxKitError(Exception):
    """Base of all errors meant for the user: shown as one line, without a traceback.

    `file` and `node` say where the error comes from, when that is known; hosts fill `node` in.
    """

    def __init__(self, message: str, *, file: str | Path | None = None, node: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.file = None if file is None else str(file)
        self.node = node

    def __str__(self) -> str:
        return self.message


class BadModelFile(FluxKitError, ValueError):
    """A model file is damaged, of another kind, or does not fit the place it was given to."""

    def __init__(self, path: str | Path, problem: str, *, field: str | None = None,
                 expected: object = None, found: object = None, advice: str | None = None) -> None:
        parts = [f"{Path(path).name or path}: {problem}"]
        if field is not None:
            parts.append(f"field {field}")
        if expected is not None:
            parts.append(f"expected {expected}")
        if found is not None:
            parts.append(f"found {found}")
        message = "; ".join(parts)
        super().__init__(message if advice is None else f"{message}. {advice}", file=path)
        self.field = field
        self.expected = expected
        self.found = found


class MissingFile(FluxKitError, FileNotFoundError):
    """A file that is needed is not there; the message says which one and where to put it."""


class BadInput(FluxKitError, ValueError):
    """A value given by the user is outside what is allowed."""


class BadWorkflow(FluxKitError, ValueError):
    """A workflow cannot be read, or does not hold together."""


class NotFinite(FluxKitError, ArithmeticError):
    """NaN or infinity where a finite value is needed: in weights, latents or pictures."""


class NotEnoughMemory(FluxKitError, MemoryError):
    """A stage does not fit into the memory there is, or the device ran out of it; nothing was saved."""

    def __init__(self, stage: str, missing: int | None, where: str, advice: str) -> None:
        lack = f"not enough {where}" if missing is None else f"{missing / 2**20:,.1f} MiB of {where} are missing"
        super().__init__(f"{stage}: {lack}; nothing was saved. {advice}")
        self.stage, self.missing = stage, missing


class FileChanged(FluxKitError):
    """A model file was changed, replaced or cut off since it was loaded; what was made with it is thrown away."""

    def __init__(self, path: str | Path, what: str) -> None:
        super().__init__(f"{path}: the file {what} while it was in use; the result is thrown away and nothing was "
                         "saved. Leave model files alone during a run, and run again", file=path)


class Interrupted(FluxKitError):
    """The user stopped the run; nothing was saved."""
