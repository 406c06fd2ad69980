"""Ed25519 signatures (RFC 8032) with keys in PEM files. Needs the package `cryptography`, the extra `record`.

openssl genpkey -algorithm ed25519 -out key.pem           the private key, for signing
openssl pkey -in key.pem -pubout -out public.pem          the public key, for checking
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.errors import UserError


def signer(path: Path) -> Callable[[bytes], tuple[str, str]]:
    """Return a function that signs messages with a private key.

    Args:
        path: PEM file of the key.

    Returns:
        A function of a message that returns (signature, public key), both as the hex of their raw bytes.

    Raises:
        UserError: The file cannot be read, or holds no Ed25519 private key without a password.
    """
    serialization, ed25519 = _cryptography()
    make = "make one by: openssl genpkey -algorithm ed25519 -out key.pem"
    data = _read(path, "signing key", make)
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except TypeError:
        raise UserError(f"signing key {path} is encrypted; give one without a password") from None
    except Exception:  # ValueError, and errors of OpenSSL for unknown algorithms
        key = None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise UserError(f"signing key {path} is not an Ed25519 private key in PEM; {make}")
    public_key = key.public_key().public_bytes_raw().hex()
    return lambda message: (key.sign(message).hex(), public_key)


def checker(path: Path) -> Callable[[bytes, str], bool]:
    """Return a function that checks signatures with a public key.

    Args:
        path: PEM file of the key.

    Returns:
        A function of a message and a signature (hex) that returns whether the holder of the private key signed it.

    Raises:
        UserError: The file cannot be read, or holds no Ed25519 public key.
    """
    serialization, ed25519 = _cryptography()
    from cryptography.exceptions import InvalidSignature

    make = "make it by: openssl pkey -in key.pem -pubout -out public.pem"
    data = _read(path, "public key", make)
    try:
        key = serialization.load_pem_public_key(data)
    except Exception:  # as above
        key = None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise UserError(f"public key {path} is not an Ed25519 public key in PEM; {make}")

    def is_valid(message: bytes, value: str) -> bool:
        try:
            key.verify(bytes.fromhex(value), message)
        except (InvalidSignature, ValueError):  # ValueError: not hex
            return False
        return True

    return is_valid


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise UserError("signatures need the package cryptography; pip install 'lethe-unlearning[record]'") from None
    return serialization, ed25519


def _read(path: Path, what: str, make: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read ({error.strerror}); {make}") from None
