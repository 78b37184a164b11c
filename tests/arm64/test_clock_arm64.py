"""What the clock measures is the call of a machine with so many cores, not of the one that emulates."""


def test_blas_has_as_many_threads_as_the_call(server):
    """OpenBLAS counts the cores that it finds; a machine that emulates has two, perhaps."""
    assert server("graviton3").submit("tests.arm64.jobs_clock:blas_threads", count=8).result().value == 8
