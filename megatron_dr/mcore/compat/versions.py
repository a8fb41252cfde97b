"""Which versions of Megatron-Core the plugin runs on: minor versions that its tests ran with."""

from megatron.core import __version__

Minor = tuple[int, int]

OLDEST: Minor = (0, 16)  # of `attach` and the hosts
OLDEST_LOOP: Minor = (0, 18)  # of Megatron's training loop: megatron_dr.train and enable()
NEWEST: Minor = (0, 20)


def _minor(version: str) -> Minor:
    major, minor = (int(part) for part in version.split(".")[:2])
    return major, minor


INSTALLED = _minor(__version__)


def check() -> None:
    """Raise ValueError where `attach` was not tried with the version that is installed."""
    _check("megatron_dr", OLDEST)


def check_loop() -> None:
    """As `check`, for Megatron's training loop."""
    _check("megatron_dr in Megatron's training loop", OLDEST_LOOP)


def _check(what: str, oldest: Minor) -> None:
    if not oldest <= INSTALLED <= NEWEST:
        raise ValueError(
            f"{what} supports megatron-core {'.'.join(map(str, oldest))} to "
            f"{'.'.join(map(str, NEWEST))}, but {__version__} is installed."
        )
