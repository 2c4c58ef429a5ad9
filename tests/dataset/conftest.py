from tests.sources import model, one_thread, photos  # noqa: F401 (fixtures)
