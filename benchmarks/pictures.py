"Plots of the benchmarks' table; ways differ in colour and in marker, line or hatch, so that they read in grey."
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

STYLES = {"ours": dict(marker="o", linestyle="-"), "plain": dict(marker="s", linestyle="--"), "ours, bf16": dict(marker="^", linestyle=":"), "image tower alone": dict(marker="D", linestyle="-.")}
COLOURS = dict(zip(STYLES, sns.color_palette("colorblind")))
HATCHES = {"image tower": "", "text tower": "///", "loss": "xx", "optimiser": "..", "data": "\\\\"}


def parts_of_steps(table, title=""):
    "Seconds of a step, part by part: a bar for each backbone and way."
    parts = table[table.part.isin(HATCHES)].assign(step=lambda t: t.backbone + ", " + t.way)
    wide = parts.pivot_table(index="step", columns="part", values="median", sort=False).reindex(columns=[p for p in HATCHES if p in set(parts.part)]).iloc[::-1]
    figure = Figure(figsize=(7, 0.8 + 0.4 * len(wide)))
    axis = figure.subplots()
    wide.plot.barh(stacked=True, ax=axis, color=sns.color_palette("colorblind"), edgecolor="black", linewidth=0.4, width=0.7)
    for bars, part in zip(axis.containers, wide.columns):
        for bar in bars:
            bar.set_hatch(HATCHES[part])
    axis.set(xlabel="seconds", ylabel="")
    axis.set_title(title, fontsize=11, loc="left")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    sns.despine(figure)
    return figure


def growth(tables, quantity, title=""):
    "Medians with quartiles, both axes in powers of ten; `tables` says of each panel: label of its axis -> (rows, column that goes along)."
    figure = Figure(figsize=(3.2 * len(tables) + 1, 3))
    axes = figure.subplots(1, len(tables), squeeze=False)
    for axis, (label, (table, along)) in zip(axes[0], tables.items()):
        for way, part in table.sort_values(along).groupby("way", sort=False):
            spread = [part["median"] - part.q1, part.q3 - part["median"]]
            axis.errorbar(part[along], part["median"], spread, label=way, color=COLOURS.get(way), capsize=3, markersize=5, **STYLES.get(way, {}))
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel=quantity)
        axis.set_xticks(sorted(set(table[along])), [f"{v:,g}" for v in sorted(set(table[along]))], minor=False)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())
        axis.grid(axis="y", alpha=0.4)
        axis.legend(frameon=False)
    axes[0][0].set_title(title, fontsize=11, loc="left")
    sns.despine(figure)
    figure.tight_layout()
    return figure
