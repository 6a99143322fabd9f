"""The fill-in experiment, run for real on small grids, against dilation and voxels written as loops."""

import csv
import itertools
import json
import shutil

import numpy as np
import pytest

import ilajax
from benchmarks import workloads
from experiments import fill_in, fill_in_measure, mnist
from experiments.data.mnist import load_mnist
from experiments.data.sets import load_dataset

LAYERS = 3
GRID = 12
OPTIONS = [
    *("--resolutions", "8", "16", "--samples", "3", "--layer-resolution", str(GRID)),
    *("--layers", str(LAYERS), "--epochs", "0"),
]


@pytest.fixture(scope="module", autouse=True)
def _small_examples():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fill_in_measure, "EXAMPLE_RESOLUTIONS", (4, 8, 16))
        yield


@pytest.fixture(scope="module")
def finished(_small_examples, tmp_path_factory):
    out = tmp_path_factory.mktemp("fill_in")
    return fill_in.main([*OPTIONS, "--out", str(out), "--report", str(out / "results")]), out


@pytest.fixture(scope="module")
def clouds():
    """The points of the shapes that are measured."""
    points = load_dataset("shapes", resolution=16, train_size=1, test_size=8).test.sets.points
    return points[np.sort(np.random.default_rng(0).choice(8, 3, replace=False))]


def voxels(points, resolution):
    """bool[r, r, r], by Python's sets: the longest edge of the box fills the grid, the box in the middle."""
    points = points.astype(np.float64)
    low, high = points.min(axis=0), points.max(axis=0)
    scaled = (points - (low + high) / 2) / (high - low).max() + 0.5
    occupied = np.zeros((resolution,) * 3, bool)
    for place in set(map(tuple, np.minimum(scaled * resolution, resolution - 1e-9).astype(int))):
        occupied[place] = True
    return occupied


def dilated(stored, layers):
    """Densities of bool [*S] and behind each layer: a site stands if one of its 3^d neighbours does."""
    found = [stored.mean()]
    for _ in range(layers):
        padded = np.pad(stored, 1)
        stored = np.zeros_like(stored)
        for shift in itertools.product(range(3), repeat=stored.ndim):
            at = tuple(slice(s, s + n) for s, n in zip(shift, stored.shape, strict=True))
            stored |= padded[at]
        found.append(stored.mean())
    return np.array(found)


def members(rows, **wanted):
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def test_density_against_resolution(finished, clouds):
    for row in members(finished[0], figure="resolution"):
        densities = [voxels(cloud, row["resolution"]).mean() for cloud in clouds]
        assert row["density"] == pytest.approx(np.mean(densities), rel=2e-3)  # borders may round
        assert row["density_p90"] == pytest.approx(np.percentile(densities, 90), rel=2e-3)
        occupied = np.mean(densities) * row["resolution"] ** 3
        assert row["points_per_voxel"] == pytest.approx(clouds.shape[1] / occupied, rel=2e-3)
        assert row["samples"] == 3


def test_fill_in_is_dilation(finished, clouds):
    """Every kind of data: random sites, surfaces, digits in two dimensions."""
    digits = load_mnist()[1].threshold(mnist.PIXEL_THRESHOLD).images[:3] > 0
    sites = workloads.random_sites(GRID, batch=workloads.FEW, density=1 / GRID, seed=0)
    uniform = np.asarray(ilajax.to_dense(sites))[..., 0] > 0
    for data, samples, rel in (
        ("uniform, 1/r", uniform, 1e-6),
        ("shapes", [voxels(cloud, GRID) for cloud in clouds], 2e-3),
        ("digits", digits, 1e-6),
    ):
        expected = np.mean([dilated(sample, LAYERS) for sample in samples], axis=0)
        rows = members(finished[0], figure="layers", data=data, bound=None)
        assert [row["layer"] for row in rows] == list(range(LAYERS + 1))
        np.testing.assert_allclose([row["density"] for row in rows], expected, rtol=rel)
        growth = [row["growth"] for row in rows[1:]]
        np.testing.assert_allclose(growth, expected[1:] / expected[:-1], rtol=2 * rel)


def test_a_bound_holds_what_the_data_have(finished):
    rows = [row for row in members(finished[0], figure="layers") if row["bound"] is not None]
    assert {row["data"] for row in rows} == {*fill_in_measure.UNIFORM, "shapes", "digits"}
    for row in rows:
        sites = row["resolution"] ** row["rank"]
        free = members(finished[0], figure="layers", data=row["data"], bound=None, layer=0)[0]
        assert abs(row["bound"] - free["density"]) <= 0.5 / sites
        if row["layer"]:
            assert row["density"] <= row["bound"]
            assert row["density"] == pytest.approx(row["bound"], rel=0.05)


def test_expectation_of_a_line_of_three_sites():
    p = 0.3
    first, second, third = fill_in_measure.expected_density(p, (3,), 2)
    assert first == pytest.approx(p)
    assert second == pytest.approx((2 * (1 - (1 - p) ** 2) + 1 - (1 - p) ** 3) / 3)
    assert third == pytest.approx(1 - (1 - p) ** 3)


def test_expectation_is_the_mean_of_draws():
    rng = np.random.default_rng(1)
    draws = [dilated(rng.random((9, 9, 9)) < 0.01, 2) for _ in range(400)]
    error = np.std(draws, axis=0) / np.sqrt(len(draws))
    expected = fill_in_measure.expected_density(0.01, (9, 9, 9), 2)
    assert (np.abs(np.mean(draws, axis=0) - expected) < 4 * error).all()


def test_a_site_alone_becomes_27():
    """The paper's factor, away from the border and as long as windows do not meet."""
    keys = np.full((3, 1, GRID**3), GRID**3, np.int32)
    keys[:, :, 0] = (5 * GRID + 5) * GRID + 5
    x = ilajax.SparseTensor(keys, np.float32(keys < GRID**3), (GRID,) * 3)
    found = fill_in_measure.fill_in(x, 2, GRID**3) * GRID**3
    np.testing.assert_allclose(found, np.repeat([[1], [27], [125]], 3, axis=1))


def test_densities_of_the_maps(finished):
    rows = members(finished[0], figure="activations")
    digits = load_mnist()[1].threshold(mnist.PIXEL_THRESHOLD).images
    for network, layers in (("input", [0]), ("dense", [1, 2, 3]), ("sparse", [1, 2, 3])):
        found = members(rows, network=network)
        assert [(row["layer"], row["sample"]) for row in found] == [
            (layer, sample) for layer in layers for sample in range(3)
        ]
    for row in members(rows, network="input"):
        assert row["density"] == (digits[row["sample"]] > 0).mean()
    slots = ilajax.capacity(0.095, (28, 28))
    assert all(0 < row["density"] <= slots / 28**2 for row in members(rows, network="sparse"))


def test_what_is_written(finished):
    rows, out = finished
    with (out / "shapes.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["density"]) for row in table] == [row["density"] for row in rows]
    assert json.loads((out / "shapes.json").read_text())["rows"] == rows
    for name in fill_in.FIGURES:
        picture = (out / f"shapes-{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert (out / "results" / f"fill_in-{name}.png").read_bytes() == picture
    for suffix in (".csv", ".json"):
        report = (out / "results" / f"fill_in{suffix}").read_bytes()
        assert report == (out / f"shapes{suffix}").read_bytes()


def test_a_resumed_run_keeps_what_is_there(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fill_in, "draw", lambda *_: (tmp_path / "shapes-resolution.png").touch())
    rows, out = finished
    record = json.loads((out / "shapes.json").read_text())
    kept = [row for row in rows if row["figure"] == "resolution" and row["resolution"] == 8]
    kept[0]["density"] = 0.125  # so that it is seen
    (tmp_path / "shapes.json").write_text(json.dumps(record | {"rows": kept}))
    more = [*OPTIONS, "--out", str(tmp_path), "--figures", "resolution", "--resume"]
    assert [row["density"] for row in fill_in.main(more)] == [
        0.125,
        *(row["density"] for row in members(rows, figure="resolution", resolution=16)),
    ]
    written = json.loads((tmp_path / "shapes.json").read_text())
    assert {name: written[name] for name in record if name != "rows"} == {
        name: value for name, value in record.items() if name != "rows"
    }
    assert ["--resume" in run["command"] for run in written["resumed"]] == [True]
    fill_in.main(more)  # measures nothing
    assert json.loads((tmp_path / "shapes.json").read_text()) == written
    with pytest.raises(SystemExit):
        fill_in.main([*more, "--seed", "1"])
    assert "was made with" in capsys.readouterr().err
    monkeypatch.setattr(fill_in_measure.Shapes, "fingerprint", lambda _: "others")
    with pytest.raises(SystemExit):
        fill_in.main(more)
    assert "not with {'data': 'shapes'" in capsys.readouterr().err


@pytest.mark.parametrize("damaged", ['{"options": {', "{}", '{"options": 1}', "3"])
def test_a_damaged_record_is_named(tmp_path, capsys, damaged):
    path = tmp_path / "shapes.json"
    path.write_text(damaged)
    with pytest.raises(SystemExit):
        fill_in.main([*OPTIONS, "--out", str(tmp_path), "--resume"])
    assert f"--resume: {path} is damaged (" in capsys.readouterr().err


def test_a_new_run_that_is_stopped_leaves_nothing_of_the_old_one(finished, tmp_path, monkeypatch):
    """Catches --resume with rows and pictures that another run measured."""
    out = shutil.copytree(finished[1], tmp_path / "out")

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fill_in, "occupancy", stopped)
    with pytest.raises(KeyboardInterrupt):
        fill_in.main([*OPTIONS, "--out", str(out), "--figures", "resolution"])
    assert json.loads((out / "shapes.json").read_text())["rows"] == []
    assert len((out / "shapes.csv").read_text().splitlines()) == 1
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == [
        "shapes.csv",
        "shapes.json",
    ]


@pytest.mark.parametrize(
    ("data", "needed"),
    [("shapes", "resolution layers activations"), ("kicad", "resolution layers")],
)
def test_a_report_is_not_replaced_by_a_part(tmp_path, capsys, data, needed):
    with pytest.raises(SystemExit):
        fill_in.main(["--data", data, "--figures", "layers", "--report", str(tmp_path)])
    assert f"only layers. Give {needed}; --resume" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    more = ["--data", "kicad", "--data-dir", str(tmp_path), "--report", str(tmp_path)]
    with pytest.raises(SystemExit):
        fill_in.main(more)
    assert "no file" in capsys.readouterr().err  # all figures of the data are the default


def test_parts_need_their_folder(tmp_path, capsys):
    with pytest.raises(SystemExit):
        fill_in.main(["--data", "kicad", "--out", str(tmp_path)])
    assert "--data-dir" in capsys.readouterr().err


def test_the_line_of_a_surface_goes_through_what_has_points_enough():
    def row(resolution, density, points_per_voxel):
        named = {"resolution": resolution, "density": density}
        return named | {"points_per_voxel": points_per_voxel}

    rows = [row(16, 2 / 16, 9.0), row(32, 2 / 32, 4.5), row(64, 0.01, 2.0)]
    assert [fill_in.limited(each) for each in rows] == [False, False, True]
    assert fill_in.surface_constant(rows) == pytest.approx(2)
    assert fill_in.surface_constant(rows[2:]) == pytest.approx(0.64)
    assert not fill_in.limited({"resolution": 64, "density": 0.01})  # a mesh
