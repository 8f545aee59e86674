"""Digests for names, without what hashlib loads for them: OpenSSL takes 3 ms and 3 MiB in every process.

These are the modules that hashlib itself falls back to, and that the standard library's ``random`` takes for the same
reason. Nothing here keeps a secret.
"""

try:
    from _blake2 import blake2b
    from _sha1 import sha1  # type: ignore[import-not-found]
except ImportError:  # another Python than CPython, or one built without
    from hashlib import blake2b, sha1

__all__ = ["blake2b", "sha1"]
