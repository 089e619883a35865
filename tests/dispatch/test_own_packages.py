"""A module of the user's that has the name of a package of ours is named, and does not reach Ray's workers."""

import pytest

from cluster.machine.search_path import job_config
from dispatch.own_packages import ROOT, check_not_hidden, hiding_module


def test_a_module_that_hides_one_of_ours_is_named_with_the_way_out(tmp_path, monkeypatch):
    check_not_hidden()
    (tmp_path / "workers.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "workers", raising=False)
    with pytest.raises(ValueError, match=rf"{tmp_path}/workers.py hides Trimtab's own package .*rename it"):
        check_not_hidden()


def test_workers_of_ray_look_for_our_packages_first_where_a_folder_hides_one(tmp_path):
    plain, hiding = tmp_path / "plain", tmp_path / "hiding"
    for folder in (plain, hiding / "cluster"):
        folder.mkdir(parents=True)
    (hiding / "cluster" / "__init__.py").touch()
    assert hiding_module(hiding) == hiding / "cluster" / "__init__.py"
    assert hiding_module(plain) is None and hiding_module(ROOT) is None
    for folder, added in ((plain, []), (hiding, [str(ROOT)])):
        config = job_config()
        config._py_driver_sys_path.extend([str(folder)])  # as ray.init does; the last one is searched first
        assert list(config._get_proto_job_config().py_driver_sys_path) == [str(folder), *added]
