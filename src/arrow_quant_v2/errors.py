"""Every exception that this package raises on purpose, and nothing else.

ArrowQuantError
├── ConfigurationError     a setting is unknown, contradictory or out of range
├── QuantizationError      a tensor or a model could not be quantized
│   └── BarMissedError     min_accuracy is missed, and no width is left that may be tried
├── ValidationError        two models cannot be compared, or the quality bar was missed
├── SourceError            a model cannot be read: missing, truncated, hostile or unknown
├── StoreError             a quantized model cannot be read or written
│   ├── ChecksumError      stored bytes are not the bytes that were written
│   └── SchemaVersionError the file is newer than this program
└── InterruptedRunError    the user stopped the run; what is finished is kept
"""


class ArrowQuantError(Exception):
    """The one base: catch this to catch everything that this package raises on purpose."""


class ConfigurationError(ArrowQuantError):
    """A setting is unknown, contradictory or out of range; raised before any work."""


class QuantizationError(ArrowQuantError):
    """A tensor or a model could not be quantized."""


class BarMissedError(QuantizationError):
    """min_accuracy is missed, and there is no width left that may be tried."""


class ValidationError(ArrowQuantError):
    """Two models cannot be compared, or the result misses the quality bar."""


class SourceError(ArrowQuantError):
    """A model cannot be read: missing, truncated, hostile or of an unknown kind."""


class StoreError(ArrowQuantError):
    """A quantized model cannot be read or written."""


class ChecksumError(StoreError):
    """Stored bytes are not the bytes that were written."""


class SchemaVersionError(StoreError):
    """The file was written in a schema that this program does not know."""


class InterruptedRunError(ArrowQuantError):
    """The user stopped the run; finished layers are kept and the message says how to go on."""
