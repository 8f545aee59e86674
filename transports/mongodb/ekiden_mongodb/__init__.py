"""MongoDB as a broker and result store: ``mongodb://`` and ``mongodb+srv://``."""

from ekiden_mongodb.backend import MongoDBBackend
from ekiden_mongodb.transport import MongoDBTransport

__all__ = ["MongoDBBackend", "MongoDBTransport"]
