"""The list of what runs at both ends of the declared ranges: of files that are there, with versions that are declared."""

from versions import ROOT, at_the_lowest, core, pinned_torch, requirements


def test_every_file_of_the_core_is_there():
    files = core()
    assert [file for file in files if not (ROOT / file).is_file()] == []
    assert len(set(files)) == len(files)


def test_every_requirement_has_a_lowest_version():
    lowest = [at_the_lowest(line) for line in requirements()]
    assert "transformers==5.10.1" in lowest and "evalplus==0.3.1" in lowest
    assert all(line.count("==") == 1 for line in [pinned_torch(), *lowest])
