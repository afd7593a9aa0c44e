"""Files that are whole or not there."""

import hashlib

CHECKSUM_BYTES = hashlib.sha256().digest_size


def seal(content: bytes) -> bytes:
    """`content` and, at its end, its SHA-256."""
    return content + hashlib.sha256(content).digest()


def unseal(sealed: bytes) -> bytes | None:
    """The content of what `seal` made; None where it does not match its checksum."""
    content, checksum = sealed[:-CHECKSUM_BYTES], sealed[-CHECKSUM_BYTES:]
    return content if hashlib.sha256(content).digest() == checksum else None
