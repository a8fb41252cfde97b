"""The package's version, for whatever must not import the package."""

VERSION = "0.1.0"
