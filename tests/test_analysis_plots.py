"""What the figures of the measurements show, from results of tiny problems and from broken ones."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from bnjax import analysis
from bnjax.analysis import plots

STEPS = np.arange(0, 8, 2)
STEP_SIZES = jnp.array([0.5, 1.0, 2.0])
CURVATURE = jnp.array([1.0, 3.0])


def quadratic(w):
    return 0.5 * (CURVATURE * w**2).sum()


def product(params):
    return (params["0"] * params["1"] * params["2"] - 1) ** 2 + 1


@pytest.fixture
def ax():
    """Axes whose figure is drawn after the test, so that warnings on the way, errors here, are found."""
    figure = Figure(figsize=(4, 3), layout="constrained")
    yield figure.subplots()
    plots.legend(figure)
    FigureCanvasAgg(figure).draw()


@pytest.fixture
def ax3d():
    figure = Figure(figsize=(4, 3))
    yield figure.add_subplot(projection="3d")
    FigureCanvasAgg(figure).draw()


@pytest.fixture(scope="module")
def trained():
    """Measurements of two seeds' descents on a quadratic, `[seeds, steps, …]`, and of a chain of three layers."""

    def descend(w):
        def step(w, _):
            return w - 0.1 * jax.grad(quadratic)(w), w

        def measure(w, _):
            return analysis.gradient_probe(quadratic, w, STEP_SIZES)

        return analysis.measured_scan(step, w, jnp.zeros(8), measure=measure, every=2)[2]

    def chain(scale):
        params = {name: scale * jnp.array(v) for name, v in (("0", 0.5), ("1", 1.5), ("2", 0.7))}
        after = jax.tree.map(lambda p: p + 0.1 * scale, params)
        return analysis.covariate_shift(product, params, after), analysis.gradient_norms(product, params)

    probes = jax.jit(jax.vmap(descend))(jnp.array([[1.0, 1.0], [2.0, -1.0]]))
    shifts, norms = jax.jit(jax.vmap(chain))(jnp.array([0.5, 1.0, 1.5, 2.0]))
    return probes, shifts, norms


def seed(tree, i):
    return jax.tree.map(lambda v: v[i], tree)


def band(ax, i=0):
    """The lowest and highest of the i-th band at each of its abscissae."""
    vertices = ax.collections[i].get_paths()[0].vertices
    xs = np.unique(vertices[:, 0])
    return np.array([[f(vertices[vertices[:, 0] == x, 1]) for x in xs] for f in (np.min, np.max)])


def test_gradient_probe_draws_the_mean_and_the_band_over_step_sizes(ax, trained):
    probe = seed(trained[0], 0)
    lines = plots.gradient_probe(ax, {"one": probe, "other": seed(trained[0], 1)}, STEPS)
    np.testing.assert_array_equal(lines["one"].get_xdata(), STEPS)
    np.testing.assert_allclose(lines["one"].get_ydata(), np.mean(probe.loss, -1), rtol=1e-6)
    np.testing.assert_allclose(band(ax), [probe.loss_min, probe.loss_max], rtol=1e-6)
    assert list(lines) == ["one", "other"]
    assert [line.get_color() for line in lines.values()] == list(plots.COLORS[:2])
    assert [line.get_linestyle() for line in lines.values()] == list(plots.STYLES[:2])
    assert (ax.get_xlabel(), ax.get_yscale()) == ("training step", "linear")


@pytest.mark.parametrize("quantity", ["gradient_distance", "gradient_cosine"])
def test_gradient_probe_over_seeds_is_the_mean_of_each_end(ax, trained, quantity):
    probes = trained[0]
    lines = plots.gradient_probe(ax, {"both": probes}, STEPS, quantity=quantity, log=quantity == "gradient_distance")
    values = np.asarray(getattr(probes, quantity))
    np.testing.assert_allclose(lines["both"].get_ydata(), values.mean((0, 2)), rtol=1e-6)
    np.testing.assert_allclose(band(ax), [values.min(-1).mean(0), values.max(-1).mean(0)], rtol=1e-6)
    assert ax.get_yscale() == ("log" if quantity == "gradient_distance" else "linear")


def test_effective_smoothness_is_a_line_on_a_logarithmic_axis(ax, trained):
    probes = trained[0]
    lines = plots.gradient_probe(ax, {"both": probes, "first": seed(probes, 0)}, STEPS, quantity="smoothness")
    largest = np.asarray(probes.max_smoothness)
    np.testing.assert_allclose(lines["both"].get_ydata(), largest.mean(0), rtol=1e-6)
    np.testing.assert_allclose(band(ax), [largest.min(0), largest.max(0)], rtol=1e-6)
    np.testing.assert_allclose(lines["first"].get_ydata(), largest[0], rtol=1e-6)
    assert len(ax.collections) == 1  # no band for a single seed
    assert ax.get_yscale() == "log"


def test_a_label_that_names_a_normalizer_has_its_style_everywhere():
    named = ("plain", "batch norm", "batch renorm", "layer norm", "group norm", "weight norm", "noisy batch norm")
    named += ("l₁ norm", "l₂ norm", "l∞ norm")
    styles = [plots.line_style(i, label) for i, label in enumerate(named)]
    assert styles == [plots.line_style(0, f"VGG, {label}, batch 32") for label in named]
    assert len({(style["color"], style["linestyle"]) for style in styles}) == len(named)
    assert plots.line_style(3, "a layer") == plots.line_style(3)
    assert plots.line_style(0, "no batch norm")["color"] != plots.line_style(0, "batch norm")["color"]


def test_wide_lines_get_a_logarithmic_axis(ax, trained):
    probe = seed(trained[0], 0)
    wide = probe._replace(loss=np.geomspace(1, 1e9, np.size(probe.loss)).reshape(np.shape(probe.loss)))
    plots.gradient_probe(ax, {"wide": wide}, STEPS)
    assert ax.get_yscale() == "log"
    other = Figure().subplots()
    plots.gradient_probe(other, {"wide": wide}, STEPS, log=False)
    assert other.get_yscale() == "linear"


def test_probe_figure_has_three_axes_and_one_legend(trained):
    figure = plots.probe_figure({"with": trained[0], "without": trained[0]}, STEPS)
    FigureCanvasAgg(figure).draw()
    assert ["loss" in figure.axes[0].get_ylabel(), "distance" in figure.axes[1].get_ylabel()] == [True, True]
    assert [ax.get_yscale() for ax in figure.axes] == ["linear", "linear", "log"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["with", "without"]
    below = figure.legends[0].get_window_extent().y1
    assert all(ax.get_tightbbox().y0 >= below for ax in figure.axes)


def test_panels_fill_rows_and_share_a_legend_and_axes():
    def draw(ax):
        plots.curves(ax, {"line": np.ones(3)}, np.arange(3), ylabel="loss")

    figure = plots.panels("three", [("a", draw), ("b", draw), ("c", draw)], size=(3, 2), sharex=True)
    assert [ax.get_title() for ax in figure.axes] == ["a", "b", "c"]
    assert figure.get_size_inches().tolist() == [6, 4] and figure.get_suptitle() == "three"
    assert figure.axes[0].get_shared_x_axes().joined(figure.axes[0], figure.axes[2])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["line"]
    alone = plots.panels("", [("", draw)], with_legend=False)
    assert len(alone.axes) == 1 and not alone.legends and alone.get_suptitle() == ""


def test_covariate_shift_of_a_layer(ax, trained):
    shifts = trained[1]
    lines = plots.covariate_shift(ax, {"chain": shifts}, STEPS, layer=1)
    np.testing.assert_allclose(lines["chain"].get_ydata(), shifts.distance[:, 1], rtol=1e-6)
    assert ax.get_yscale() == "log"
    with pytest.raises(ValueError, match=r"layer must be .* 3 of 'chain', got 3"):
        plots.covariate_shift(ax, {"chain": shifts}, STEPS, layer=3)


def test_the_first_layers_shift_is_zero_and_needs_no_logarithm(ax, trained):
    plots.covariate_shift(ax, {"chain": trained[1]}, STEPS, layer=0)
    assert ax.get_yscale() == "linear"


def test_gradient_norms_by_depth_over_seeds(ax, trained):
    norms = trained[2]
    lines = plots.gradient_norms(ax, {"four seeds": norms, "one": seed(norms, 0)})
    np.testing.assert_allclose(lines["four seeds"].get_ydata(), [np.mean(v) for v in norms.values()], rtol=1e-6)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "1", "2"]
    with pytest.raises(ValueError, match=r"norms\['b'\] must be of the layers \['0', '1', '2'\]"):
        plots.gradient_norms(ax, {"a": norms, "b": {"0": 1.0}})


def test_activation_percentiles_and_saturation(ax):
    def measured(shift):
        h = shift + jnp.outer(jnp.linspace(-4, 4, 41), jnp.array([1.0, 2.0]))
        return analysis.activation_statistics({"a": h, "b": 3 * h}, jax.nn.sigmoid)

    found = jax.vmap(measured)(jnp.arange(4.0))
    percentiles = found["a"].percentiles[:, :, 1]
    lines = plots.activation_percentiles(ax, {"unit 1": percentiles}, STEPS)
    np.testing.assert_allclose(lines["unit 1"].get_ydata(), percentiles[:, 1], rtol=1e-6)
    np.testing.assert_allclose(band(ax), percentiles[:, [0, 2]].T, rtol=1e-6)
    assert "15, 50, 85" in ax.get_ylabel()
    saturated = {name: one.saturated for name, one in found.items()}
    layers = plots.curves(ax, saturated, STEPS, ylabel="saturated", ordered=True)
    np.testing.assert_allclose(layers["b"].get_ydata(), found["b"].saturated, rtol=1e-6)
    assert to_hex(layers["a"].get_color()) not in plots.COLORS
    with pytest.raises(ValueError, match="percentiles must be 3 with their levels, got 2"):
        plots.activation_percentiles(ax, {"two": percentiles[:, :2]}, STEPS)


@pytest.mark.parametrize("log", [False, True])
def test_layer_map_has_a_row_for_each_layer(ax, log):
    values = {"first": np.array([[0.0, 1.0, 2.0, np.nan], [0.0, 3.0, 4.0, 5.0]]), "second": np.arange(1.0, 5.0)}
    drawn = plots.layer_map(ax, values, [0, 1, 10, 100], log=log)
    expected = np.ma.masked_invalid([[0, 2, 3, np.nan], [1, 2, 3, 4]])
    if log:
        expected = np.ma.masked_equal(expected, 0)
    np.testing.assert_array_equal(drawn.get_array().mask, expected.mask)
    np.testing.assert_array_equal(drawn.get_array().compressed(), expected.compressed())
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["first", "second"]
    assert ax.patch.get_hatch()
    np.testing.assert_array_equal(drawn._coordinates[0, :, 0], [-0.5, 0.5, 5.5, 55, 145])
    ax.figure.colorbar(drawn, ax=ax)


def test_learning_rate_range_marks_where_it_breaks(ax):
    rates = jnp.array([0.1, 0.5, 1.5, 30.0])
    found = analysis.learning_rate_range(lambda w, x: (w - x) ** 2, 1.0, rates, (jnp.zeros(20),))
    lines = plots.learning_rate_range(ax, {"parabola": found})
    expected = np.where([True, True, False, False], np.mean(found.loss[:, -2:], 1), np.nan)
    np.testing.assert_allclose(lines["parabola"].get_ydata(), expected, rtol=1e-6)
    assert lines["parabola"].get_label() == "parabola (breaks at 1.5)"
    assert any(np.array_equal(line.get_xdata(), [1.5, 1.5]) for line in ax.lines)
    crosses = [line for line in ax.lines if line.get_marker() == "x"]
    np.testing.assert_array_equal(crosses[0].get_xdata(), [1.5, 30.0])
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


def test_learning_rate_range_tells_what_never_breaks_or_trains(ax):
    train = jax.vmap(lambda w, rate: analysis.learning_rate_range(lambda w, x: w**2 + x, w, rate, (jnp.zeros(9),)))
    good, bad = (train(jnp.array([1.0, 2.0]), jnp.full((2, 1), rate)) for rate in (0.1, 3.0))
    lines = plots.learning_rate_range(ax, {"good": good, "bad": bad})
    assert [line.get_label() for line in lines.values()] == ["good (never breaks)", "bad (never trains)"]


def test_spectral_density_is_clipped_at_its_floor(ax):
    found = analysis.spectral_density(quadratic, jnp.ones(2), key=jax.random.key(0), num_probes=3, num_steps=2)
    nan = jnp.full_like(found.density, jnp.nan)
    single = found._replace(standard_error=nan, low=nan, high=nan)  # as of one probe
    lines = plots.spectral_density(ax, {"three": found, "one": single}, floor=1e-3)
    np.testing.assert_allclose(lines["one"].get_ydata(), np.maximum(found.density, 1e-3), rtol=1e-6)
    assert (ax.get_yscale(), ax.get_ylim()[0]) == ("log", 1e-3)
    assert lines["three"].get_label() == "three (Ritz values 1 to 3)"
    assert len(ax.collections) == 1
    assert band(ax).min() == 1e-3
    assert band(ax).max() == pytest.approx(float(np.max(found.high)), rel=1e-6)
    marks = [line for line in ax.lines if line.get_marker() == "v"]
    np.testing.assert_allclose(marks[0].get_xdata(), [1, 3], rtol=1e-5)


def test_spectral_density_with_the_largest_eigenvalues(ax):
    key = jax.random.key(0)
    density = analysis.spectral_density(quadratic, jnp.ones(2), key=key, num_probes=3, num_steps=2)
    pairs = analysis.hessian_eigenpairs(quadratic, jnp.ones(2), 2, key=key)
    lines = plots.spectral_density(ax, {"a": density, "b": density}, pairs={"b": pairs})
    assert lines["a"].get_label() == "a (Ritz values 1 to 3)"
    assert lines["b"].get_label() == "b (2 eigenvalues, 1 to 3)"
    (marks,) = (line for line in ax.lines if line.get_marker() == "^")
    np.testing.assert_allclose(marks.get_xdata(), pairs.values)
    assert marks.get_color() == lines["b"].get_color()
    stems = ax.collections[-2].get_segments()
    np.testing.assert_allclose([stem[0][0] for stem in stems], pairs.values)
    wide = pairs._replace(residuals=jnp.array([0.5, 0.25]))
    plots.spectral_density(ax, {"b": density}, pairs={"b": wide})
    whiskers = ax.collections[-1].get_segments()
    np.testing.assert_allclose([whisker[:, 0] for whisker in whiskers], [[2.5, 3.5], [0.75, 1.25]], rtol=1e-5)
    with pytest.raises(ValueError, match=r"pairs must have labels of densities, \['b'\], got \['c'\]"):
        plots.spectral_density(ax, {"b": density}, pairs={"c": pairs})


LAYERS = {"first": jnp.array([[3.0], [0.0], [1.0]]), "second": {"w": jnp.array([[4.0, 0], [0, 2], [1, 1]])}}


def test_layers_of_eigenvectors(ax):
    weights = analysis.layer_weights(LAYERS)
    np.testing.assert_allclose(weights["first"], [0.36, 0, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(weights["second"], [0.64, 1, 2 / 3], rtol=1e-6)
    shown = plots.layer_weights(ax, weights)
    np.testing.assert_allclose(shown.get_array(), np.stack(list(weights.values())))
    assert [text.get_text() for text in ax.get_yticklabels()] == ["first", "second"]
    assert ax.get_yticks()[0] < ax.get_yticks()[1] and not ax.yaxis_inverted()
    assert shown.get_clim() == (0, 1)  # the largest part
    scaled = analysis.layer_weights(jax.tree.map(lambda v: 1e-30 * v, LAYERS), ["second"])
    np.testing.assert_allclose(scaled["second"], weights["second"], rtol=1e-6)


@pytest.mark.parametrize("log", [False, True])
def test_traces_of_layers(ax, log):
    matrix = jnp.array([[2.0, 1, 0.5], [1, 3, 1], [0.5, 1, 4]])

    def loss(w):
        vector = jnp.concatenate([w["a"], w["b"]])
        return 0.5 * vector @ matrix @ vector

    params = {"a": jnp.ones(2), "b": jnp.ones(1)}
    operator = analysis.hessian_operator(loss, params)
    traces = analysis.layer_traces(operator, key=jax.random.key(1), num_samples=40)
    for name, block in {"a": matrix[:2, :2], "b": matrix[2:, 2:]}.items():
        assert traces[name].low <= jnp.trace(block) <= traces[name].high
    whole = analysis.trace(operator, key=jax.random.key(1), num_samples=40)
    np.testing.assert_allclose(sum(t.estimate for t in traces.values()), whole.estimate, rtol=1e-5)
    bars = plots.layer_traces(ax, traces, log=log)
    np.testing.assert_allclose([bar.get_width() for bar in bars], [t.estimate for t in traces.values()], rtol=1e-6)
    segments = bars.errorbar.lines[2][0].get_segments()
    np.testing.assert_allclose(segments[0][:, 0], [traces["a"].low, traces["a"].high], rtol=1e-5)
    assert ax.yaxis_inverted() and ax.get_xscale() == ("log" if log else "linear")


def test_traces_of_one_sample_have_no_whiskers(ax):
    operator = analysis.SymmetricOperator(lambda v: v, {"a": jnp.zeros(2)})
    bars = plots.layer_traces(ax, analysis.layer_traces(operator, key=jax.random.key(0), num_samples=1))
    np.testing.assert_allclose(bars.errorbar.lines[2][0].get_segments()[0][:, 0], [2, 2])


def test_linear_path_marks_the_barrier(ax):
    path = analysis.linear_path(lambda w: (w**2 - 1) ** 2 + 0.1 * w, jnp.array(-1.0), jnp.array(1.0))
    lines = plots.linear_path(ax, {"well": path})
    np.testing.assert_allclose(lines["well"].get_ydata(), path.loss, rtol=1e-6)
    assert lines["well"].get_label() == "well (barrier 1)"
    (arrow,) = ax.texts
    np.testing.assert_allclose([*arrow.xy, *arrow.xyann], [0.5, 1.0, 0.5, 0.0], atol=1e-6)
    dotted = next(line for line in ax.lines if line.get_linestyle() == ":")
    np.testing.assert_allclose(dotted.get_ydata(), 0, atol=1e-6)  # the mean of -0.1 and 0.1
    seeds = jax.tree.map(lambda v: jnp.stack([v, v]), path)
    np.testing.assert_allclose(plots.linear_path(ax, {"s": seeds})["s"].get_ydata(), path.loss, rtol=1e-6)


@pytest.fixture(scope="module")
def plane():
    path = jnp.stack([jnp.linspace(2, 0, 6), jnp.linspace(1, 0, 6) ** 2], 1)
    found = analysis.trajectory_plane(path)
    grid = (jnp.linspace(-3, 3, 13), jnp.linspace(-1, 1, 5))
    return found, analysis.loss_surface(quadratic, found.origin, found.directions, grid), grid


@pytest.mark.parametrize("log", [False, True])
def test_a_page_with_a_surface_that_turns(plane, tmp_path, log):
    pytest.importorskip("plotly")
    found, losses, grid = plane
    losses = losses.at[0, 0].set(jnp.nan).at[1, 1].set(-1.0)
    figure = plots.explore(losses, grid, tmp_path / "surface.html", plane=found, title="A loss", log=log)
    surface, path = figure.data
    shown = np.log10(np.where(losses > 0, losses, np.nan)) if log else np.asarray(losses)
    np.testing.assert_allclose(surface.z, shown.T, rtol=1e-5)
    np.testing.assert_array_equal(surface.x, grid[0])
    np.testing.assert_array_equal(surface.y, grid[1])
    assert np.isnan(surface.z[0, 0]) and np.isnan(surface.z[1, 1]) == log
    np.testing.assert_allclose(np.stack([path.x, path.y], 1), found.coordinates, rtol=1e-6)
    assert "%{z" in surface.hovertemplate  # which is the height at the point, not at its mirror image
    page = (tmp_path / "surface.html").read_text()
    assert page.count("<script") and "src=" not in page.split("<body>")[0] and "A loss" in page
    assert not re.search(r"<(script|link)[^>]*(src|href)=", page)  # nothing from the network


def test_contours_have_the_levels_asked_for(ax, plane):
    _, losses, grid = plane
    contours = plots.loss_surface(ax, losses, grid, levels=[0.5, 1, 2, 4])
    np.testing.assert_array_equal(contours.levels, [0.5, 1, 2, 4])
    assert contours.extend == "both"
    lines = ax.collections[1]
    np.testing.assert_array_equal(lines.levels, [0.5, 2])  # every other one
    assert {text.get_text() for text in lines.labelTexts} <= {"0.5", "2"}
    assert all(text.get_fontsize() >= 8 for text in lines.labelTexts)
    ax.figure.colorbar(contours, ax=ax)


@pytest.mark.parametrize("count", [5, 14])
def test_levels_are_round_and_hold_all_losses(ax, count):
    a = np.linspace(-3, 3, 12)
    wide = 10.0 ** (a[:, None] + 0.1 * a[None])
    for log in (False, True):
        contours = plots.loss_surface(ax, wide, (a, a), levels=count, log=log)
        assert contours.levels[0] <= wide.min() or not log
        assert contours.levels[-1] >= wide.max()
        assert count // 2 <= len(contours.levels) <= count + 3
        assert all(float(f"{level:.3g}") == pytest.approx(level) for level in contours.levels)


def test_trajectory_lies_on_the_plane_and_on_the_relief(ax, ax3d, plane):
    found, losses, grid = plane
    plots.loss_surface(ax, losses, grid)
    line = plots.trajectory(ax, found)
    np.testing.assert_allclose(np.transpose(line.get_data()), found.coordinates, rtol=1e-6)
    parts = np.asarray(found.explained_variance)
    assert ax.get_xlabel() == f"principal direction 1 ({100 * parts[0]:.1f} % of variance)"
    plots.loss_surface(ax3d, losses, grid)
    exact = jax.vmap(lambda c: quadratic(found.origin + c @ jnp.stack(found.directions)))(found.coordinates)
    for heights, tolerance in ((exact, 1e-6), ((losses, grid), 0.2)):
        lifted = plots.trajectory(ax3d, found, heights=heights)
        np.testing.assert_allclose(lifted.get_data_3d()[2], exact, rtol=tolerance, atol=tolerance)
    assert plots.trajectory(ax3d, found, heights=exact, log=True).get_data_3d()[2][0] == pytest.approx(
        np.log10(exact[0])
    )
    with pytest.raises(ValueError, match="heights must be given on axes of three dimensions"):
        plots.trajectory(ax3d, found)
    with pytest.raises(ValueError, match="heights must be 6, as many as the points, got 3"):
        plots.trajectory(ax3d, found, heights=exact[:3])
    with pytest.raises(ValueError, match="at least 2 directions, got 1"):
        plots.trajectory(ax, found._replace(coordinates=found.coordinates[:, :1]))


def test_values_not_finite_leave_gaps_and_crosses(ax):
    values = np.array([1.0, np.nan, np.inf, 2.0])
    line = plots.curves(ax, {"broken": values}, STEPS, ylabel="loss", log=True)["broken"]
    np.testing.assert_array_equal(line.get_ydata(), [1, np.nan, np.nan, 2])
    np.testing.assert_array_equal(ax.lines[1].get_xdata(), STEPS[1:3])
    assert ax.lines[1].get_marker() == "x"


@pytest.mark.by_default(3)
@pytest.mark.parametrize(
    ("value", "shape"),
    [*((value, (1, 1, 1)) for value in (np.nan, np.inf, 0.0, -1.0, 1.0)), (-np.inf, (3, 4, 2)), (1.0, (2, 3, 1))],
)
def test_anything_can_be_drawn(value, shape, trained, plane):
    """Results that are all broken, zero or negative, and single steps, seeds and points, raise no warning."""
    full = np.full(shape, value)
    full[..., 0] = np.inf if value == -np.inf else value
    steps = np.arange(shape[1])
    figure = Figure(figsize=(8, 8))
    axes = figure.subplots(4, 3).ravel()
    probes = analysis.GradientProbe(*(full,) * 4, *(full[..., 0],) * 2, full, full[..., 0], full)
    for ax, quantity in zip(axes, ("loss", "gradient_distance", "gradient_cosine", "smoothness"), strict=False):
        plots.gradient_probe(ax, {"p": probes}, steps, quantity=quantity, log=True)
    plots.layer_map(axes[4], {"a": full[..., 0], "b": full[..., 0]}, steps, log=True)
    plots.activation_percentiles(axes[5], {"u": full[0][:, [0, 0, 0]]}, steps)
    plots.gradient_norms(axes[6], {"n": {"a": full[:, 0, 0], "b": full[:, 0, 0]}})
    seeds, rates = full[:, 0, 0], np.broadcast_to(steps + 1.0, shape[:2])
    trains = np.zeros(shape[:2], bool)
    plots.learning_rate_range(axes[7], {"r": analysis.LearningRateRange(rates, full, trains, seeds, seeds)})
    line = full[0, :, 0]
    density = analysis.SpectralDensity(steps, line, line, full[0], full[0], np.ones(()), line, line)
    plots.spectral_density(axes[8], {"d": density})
    plots.linear_path(axes[9], {"l": analysis.LinearPath(rates, full[..., 0], seeds, seeds)}, log=True)
    grid = np.arange(3.0), np.arange(2.0)
    plots.loss_surface(axes[10], np.full((3, 2), value), grid)
    plots.loss_surface(axes[11], np.full((3, 2), value), grid, log=True)
    plots.trajectory(axes[11], plane[0]._replace(coordinates=full[0][:, [0, 0]]))
    relief = figure.add_subplot(projection="3d")
    plots.loss_surface(relief, np.full((3, 2), value), grid, log=True)
    plots.trajectory(relief, plane[0], heights=(np.full((3, 2), value), grid))
    FigureCanvasAgg(figure).draw()


def test_values_that_do_not_fit_are_named(ax, trained):
    probes = trained[0]
    with pytest.raises(ValueError, match=r"probes\['p'\].loss must be of shape \[steps, K\] or .* got \[3\]"):
        plots.gradient_probe(ax, {"p": seed(seed(probes, 0), 0)}, STEPS)
    with pytest.raises(ValueError, match=r"steps must be 4 increasing numbers.*np.arange\(4\)"):
        plots.gradient_probe(ax, {"p": probes}, STEPS[:3])
    with pytest.raises(ValueError, match="figure must have a constrained layout"):
        plots.legend(Figure())
    with pytest.raises(ValueError, match="increasing"):
        plots.curves(ax, {"a": np.ones(2)}, [1, 1], ylabel="")
    with pytest.raises(ValueError, match=r"quantity must be one of loss, .* got 'los'"):
        plots.gradient_probe(ax, {"p": probes}, STEPS, quantity="los")
    with pytest.raises(ValueError, match=r"losses must be of 2 by 2 points at least.* got \[1, 3\]"):
        plots.loss_surface(ax, np.ones((1, 3)), ([0], [0, 1, 2]))
    with pytest.raises(ValueError, match=r"coordinates\[1\] must be 3 increasing"):
        plots.loss_surface(ax, np.ones((2, 3)), ([0, 1], [0, 1]))
    with pytest.raises(ValueError, match=r"densities\['d'\].density must be of shape \[points\]"):
        plots.spectral_density(ax, {"d": analysis.SpectralDensity(*(np.ones((2, 3)),) * 8)})


def test_measuring_needs_no_matplotlib():
    code = """
import sys, bnjax.analysis
print("matplotlib" in sys.modules)
import bnjax.analysis.plots
print("matplotlib.pyplot" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]
