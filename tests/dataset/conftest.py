from tests.sources import model, photos  # noqa: F401 (fixtures)
