"""Classes by name, by number, by index."""

import unicodedata

from torch import Tensor

from support.command import UserError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def number_meant(name: str) -> int | None:
    """The number that "7", "07" or "seven" means; None for other names."""
    name = name.strip().lower()
    if name in WORDS:
        return WORDS.index(name)
    return int(name) if name.isdecimal() and len(name) < 20 else None


def find_class(name: int | str, class_names: list[str]) -> int | None:
    """The index of the class with this name or, where it is the only one, with a name that means
    the same number ("3" and "three"). None where there is none."""
    text, *names = (unicodedata.normalize("NFC", str(each)) for each in (name, *class_names))
    numbers, wanted = [number_meant(each) for each in names], number_meant(text)
    if text in names:
        return names.index(text)
    return numbers.index(wanted) if wanted is not None and numbers.count(wanted) == 1 else None


def label_of(label: int | str, class_names: list[str]) -> int:
    """The index of a class given by its name or number (`find_class`) or, where no class name means
    a number, by its index. Raises UserError."""
    found, index = find_class(label, class_names), number_meant(str(label))
    if found is None and index is not None and not any(
            number_meant(name) is not None for name in class_names):
        found = index if index < len(class_names) else None
    if found is None:
        raise UserError(f"label {label} is not a class of this model: "
                        f"{', '.join(class_names[:20])}{' ...' * (len(class_names) > 20)}")
    return found


def label_list(y: Tensor, names: list[str], most: int = 100) -> str:
    """The class names of the labels y (N,), one for each."""
    return ", ".join(names[i] for i in y[:most].tolist()) + f" ... ({len(y):,})" * (len(y) > most)
