"""The ops inside other libraries' models. Nothing here imports those libraries: their objects are handed in."""
