"""The plugin's rows in a layout: `megatron_dr/mcore/buffer_rows/row_map.py` in numbers."""

from dataclasses import dataclass

from megatron_dr.plan.layout import Layout, Place

_FEW, _MANY = 8, 128  # rows: fewer are a coarse set, more a gram that costs


@dataclass(frozen=True)
class Rows:
    """What the plugin does.

    Attributes:
        slots: general gradient buffers of a rank; slot_bytes: of an element of those after the
            first.
        ranks: g, data x context ranks whose gradients are summed into one row.
        target_ranks: data-parallel ranks that run the target alone.
        halves: alpha is auto, which halves the target.
        exact: the gram; else it is made from sketches of `sketch` elements.
        blocks: that are projected, and one more where some parameters are not.
    """

    slots: int = 1
    ranks: int = 1
    target_ranks: int = 0
    halves: bool = False
    exact: bool = True
    sketch: int = 4096
    slot_bytes: int = 4
    blocks: int = 1

    def place(self, layout: Layout) -> Place:
        """Which row group a rank belongs to."""
        return lambda rank: layout.data_rank(rank) // self.ranks

    def of(self, layout: Layout) -> "Counts":
        """What there is in a layout.

        Raises:
            ValueError: rows of so many ranks can't be had.
        """
        least = ranks_that_belong_together(layout)
        if self.ranks % least or layout.data % self.ranks:
            raise ValueError(
                f"rows of {self.ranks} ranks must be a multiple of {least} (ranks that share "
                f"sequences or exchange tokens) and divide the {layout.data} data x context ranks: "
                "change --dr-row-ranks."
            )
        groups = layout.data // self.ranks
        target_groups = self.target_ranks // max(1, self.ranks // layout.cp)
        by_group = self.halves and (target_groups or groups) % 2 == 0
        targets = 0 if target_groups else 2 if self.halves and not by_group else 1
        rows = (groups - target_groups) * self.slots
        sums = groups * self.slots + (0 if target_groups else 2 if self.halves else 1)
        vectors = rows + (2 if self.halves else 1)
        return Counts(groups, rows, vectors, sums, targets, 2 if by_group else 1)


@dataclass(frozen=True)
class Counts:
    """Of all ranks.

    Attributes:
        groups: G, row groups of data ranks.
        rows, vectors, sums: M, R and P of `row_map.py`.
        targets: times that a rank's buffer holds the target alone.
        halves: that it is then summed into: 2 where they are those of neighbouring groups.
    """

    groups: int
    rows: int
    vectors: int
    sums: int
    targets: int
    halves: int


def ranks_that_belong_together(layout: Layout) -> int:
    """`megatron_dr/mcore/compat.py`, ranks_per_row."""
    return max(layout.cp, layout.ep * layout.etp // layout.tp, 1)


def ranks_near_a_node(layout: Layout, node: int) -> int:
    """What --dr-row-ranks is by default.

    Args:
        node: GPUs of a node.
    """
    of_a_node = sum(rank // node == 0 for rank in layout.data_group(0))
    return near_a_node(layout.data, ranks_that_belong_together(layout), of_a_node)


def near_a_node(ranks: int, least: int, node: int, instance: int = 0) -> int:
    """How many ranks make a row: as near to a node's as leaves 8 to 128 rows.

    Each byte then crosses between nodes once for a node, not once for each of its ranks. Where
    there are fewer than 8 rows anyway, rows are as small as they can be.

    Args:
        ranks: that hold the same piece of the model.
        least: of a row.
        node: of them, in a node.
        instance: of them, in an instance of the distributed optimizer, in which rows lie, or which
            lies in a row; 0: all.

    Raises:
        ValueError: ranks that belong together do not divide the ranks.
    """
    sizes = [
        size for size in range(least, ranks + 1, least)
        if ranks % size == 0 and nests(size, instance or ranks)
    ]  # fmt: skip
    if not sizes:
        raise ValueError(
            f"a row has the {least} ranks that share sequences or exchange tokens, which do not "
            f"divide the {ranks} data x context ranks: give smaller expert parallel sizes."
        )
    good = [size for size in sizes if _FEW <= ranks // size <= _MANY]
    if not good:
        above = [size for size in sizes if ranks // size > _MANY]
        return max(above, default=min(sizes))
    return min(good, key=lambda size: abs(size - node))


def nests(size: int, instance: int) -> bool:
    """Whether rows of so many ranks lie in instances of so many, or instances in rows."""
    return max(size, instance) % min(size, instance) == 0
