"""An app whose broker no other process can reach."""

from ekiden import Ekiden

app = Ekiden("in memory", broker="memory://faults")
