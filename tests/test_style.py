"""How the program is written: no function with many branches or lines, no dense statement.

Branches in expressions count as those in statements do. An idea is what a reader has to work out
on its own: a statement is one, and each comprehension, condition or unpacking in it is another.
"""

import ast

import pytest
from conftest import PROGRAM

MOST_BRANCHES = 12
MOST_BRANCHES_OF_EXCEPTIONS = 15
EXCEPTIONS = ("check_wrapper", "page_entry")
MOST_LINES = 50
MOST_IDEAS = 4

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
BRANCHES = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.IfExp)
ONE_IDEA = (ast.IfExp, ast.Lambda, ast.NamedExpr, ast.BoolOp)
NOT_MEASURED = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
TREE = ast.parse(PROGRAM.read_text(encoding="utf-8"))


def steps(comprehension):
    """Return the number of `for` and `if` in a comprehension."""
    return sum(1 + len(generator.ifs) for generator in comprehension.generators)


def branches(function):
    """Return the number of ways through a function, those in its expressions included."""
    count = 1
    for node in ast.walk(function):
        if isinstance(node, BRANCHES):
            count += 1
        elif isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        elif isinstance(node, COMPREHENSIONS):
            count += steps(node)
    return count


def expressions(statement):
    """Yield the expressions of a statement, without those of the statements inside it."""
    for child in ast.iter_child_nodes(statement):
        if isinstance(child, (ast.stmt, ast.ExceptHandler)):
            continue
        yield child
        yield from expressions(child)


def ideas(statement):
    """Return how many things a reader has to work out in a statement."""
    count = 1 + further_values(statement)
    for node in expressions(statement):
        count += ideas_of_expression(node)
    return count


def ideas_of_expression(node):
    if isinstance(node, COMPREHENSIONS):
        return steps(node)
    if isinstance(node, ast.Compare):
        return int(len(node.ops) > 1)
    if isinstance(node, ast.Starred):
        return int(isinstance(node.ctx, ast.Load))
    return int(isinstance(node, ONE_IDEA))


def further_values(statement):
    """Return how many values beyond the first a statement assigns to as many names."""
    if not isinstance(statement, ast.Assign):
        return 0
    if not isinstance(statement.targets[0], ast.Tuple):
        return 0
    if not isinstance(statement.value, ast.Tuple):
        return 0
    return len(statement.value.elts) - 1


def measured_statements(tree):
    """Yield the statements of a tree; of a dict that is assigned, each entry as one."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt) or isinstance(node, NOT_MEASURED):
            continue
        value = getattr(node, "value", None)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(value, ast.Dict):
            for entry in value.values:
                yield ast.copy_location(ast.Expr(entry), entry)
        else:
            yield node


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def test_no_function_has_many_branches():
    too_many = {}
    for function in functions(TREE):
        limit = MOST_BRANCHES
        if function.name in EXCEPTIONS:
            limit = MOST_BRANCHES_OF_EXCEPTIONS
        if branches(function) > limit:
            too_many[function.name] = branches(function)
    assert too_many == {}


def test_each_exception_is_needed():
    branches_by_name = {function.name: branches(function) for function in functions(TREE)}
    for name in EXCEPTIONS:
        assert branches_by_name[name] > MOST_BRANCHES
    assert len(EXCEPTIONS) <= 3


def test_no_function_is_longer_than_a_screen():
    too_long = {}
    for function in functions(TREE):
        lines = function.end_lineno - function.lineno + 1
        if lines > MOST_LINES:
            too_long[function.name] = lines
    assert too_long == {}


def test_no_statement_is_dense():
    dense = {}
    for statement in measured_statements(TREE):
        if ideas(statement) > MOST_IDEAS:
            dense[statement.lineno] = ast.unparse(statement)[:100]
    assert dense == {}


COUNTED = [
    ("def f(x):\n    return x", 1),
    ("def f(x):\n    return 1 if x else 2", 2),
    ("def f(x):\n    return x or 1 or 2", 3),
    ("def f(x):\n    return [a for a in x if a]", 3),
    ("def f(x):\n    try:\n        x()\n    except ValueError:\n        pass", 2),
    ("def f(x):\n    while x:\n        for a in x:\n            if a:\n                x()", 4),
]


@pytest.mark.parametrize(("text", "count"), COUNTED)
def test_branches_are_counted(text, count):
    assert branches(ast.parse(text)) == count


DENSE = [
    ("x = 1", 1),
    ("x = a if b else c", 2),
    ("x = [a for a in b if a]", 3),
    ("x, y = 1, 2", 2),
    ("x = lambda a: a or 1", 3),
    ("x = [*a, *b]", 3),
    ("x = 0 < a < 1", 2),
    ("if a and b:\n    x = [c for c in d if c]", 2),
]


@pytest.mark.parametrize(("text", "count"), DENSE)
def test_ideas_are_counted(text, count):
    assert ideas(ast.parse(text).body[0]) == count
