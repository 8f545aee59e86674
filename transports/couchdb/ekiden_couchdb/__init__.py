"""CouchDB as a broker and result store: ``couchdb://``, and ``couchdbs://`` with TLS."""

from ekiden_couchdb.backend import CouchDBBackend
from ekiden_couchdb.transport import CouchDBTransport

__all__ = ["CouchDBBackend", "CouchDBTransport"]
