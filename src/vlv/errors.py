"""The errors that vlv raises on purpose.

```
VLVError                      every error below; the command line prints it as one line, exit code 1
├── ConfigError               a setting is unknown, of the wrong type, or contradicts another
├── DataError                 an input that is missing, empty, damaged or not the one expected
│   ├── CacheError            what was computed before is not that of these images, this model or this crop
│   └── ImageError            one image that cannot be read, or that is refused
├── ModelFolderError          a folder that is no model, or whose files disagree
│   └── MissingPartError      a model without the part that the command needs
├── CheckpointError           a training state that is damaged or belongs to another configuration
├── OutputError               a result that cannot be written, or would overwrite another
├── OtherProcessError         one of the processes that train together failed; that one says why
└── EndpointError             a model behind an address that cannot be reached, or refuses us
    ├── RequestError          one request that failed for good; the others go on
    └── BudgetError           what may be spent is spent
```

The message is one sentence that says what is wrong (with the value) and how to mend it.
"""


class VLVError(Exception):
    """Root of every error that vlv raises on purpose."""


class ConfigError(VLVError):
    """A setting is unknown, of the wrong type, or contradicts another."""


class DataError(VLVError):
    """An input is missing, empty, damaged or not the one expected."""


class CacheError(DataError):
    """What was computed before is missing, or not that of these images, this model or this crop."""


class ImageError(DataError):
    """One image cannot be read, or is refused because of its size, shape or format."""


class ModelFolderError(VLVError):
    """A folder is no model, or its files disagree with each other."""


class MissingPartError(ModelFolderError):
    """The model lacks the part that the command needs."""


class CheckpointError(VLVError):
    """A training state is damaged, or belongs to another configuration."""


class OutputError(VLVError):
    """A result cannot be written, or would overwrite another."""


class OtherProcessError(VLVError):
    """One of the processes that train together failed; that one says why.

    Attributes:
        told: Whether it could; a process that was killed cannot.
    """

    def __init__(self, message: str, *, told: bool) -> None:
        super().__init__(message)
        self.told = told


class DeviceLostError(VLVError):
    """A GPU failed in a way that ends the process's use of it."""


class EndpointError(VLVError):
    """A model behind an address cannot be reached, or refuses us."""


class RequestError(EndpointError):
    """One request failed for good; the others go on."""


class BudgetError(EndpointError):
    """What may be spent is spent."""
