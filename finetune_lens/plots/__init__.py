def figures_of(result):
    return {}
