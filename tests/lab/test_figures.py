"""The laboratory's figures have a legend of every line, whichever panel it is in."""

from matplotlib.figure import Figure

from lab.figures import legend_below


def test_a_legend_names_the_lines_of_every_panel_once():
    figure = Figure()
    left, right = figure.subplots(1, 2)
    for axis, labels in ((left, ("a", "b")), (right, ("b", "c"))):
        for label in labels:
            axis.plot([0, 1], label=label)
    legend_below(figure, (left, right), columns=2)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c"]
