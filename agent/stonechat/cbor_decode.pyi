# What loads() returns is whatever was encoded: Any, which a board has no module to name.
from typing import Any

MAX_DEPTH: int

def loads(data: Any) -> Any: ...
