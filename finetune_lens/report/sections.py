"""What the page says of each analysis beside its numbers: the question, and what to beware of."""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class About:
    """Title, question and caveats of one kind of result."""

    title: str
    question: str
    caveats: tuple[str, ...] = field(default=())

    def of(self, what: str) -> "About":
        """The same, of one of several such results."""
        return replace(self, title=f"{self.title}: {what.replace('_', ' ').replace('-', ' ')}")


SECTIONS = {
    "updates": About(
        "Update anatomy",
        "How large is the update, of what rank, and where does it lie?",
        (
            "Norms compare parts of one update; a small norm does not show that a part is unimportant.",
            "The band of chance turns the update at random; it keeps its size and spectrum.",
        ),
    ),
    "intruders": About(
        "Intruder dimensions",
        "Which leading singular vectors of the tuned weights resemble none of the base's?",
        (
            "A count means little without its null: a few large singular values in random directions give some too.",
            "Of nearly equal singular values single vectors are arbitrary; the table marks them.",
        ),
    ),
    "check": About(
        "Trust gate",
        "Is this pair, on this machine, safe to draw conclusions from?",
        ("A pass shows that the instruments agree with the plain models; it does not show that a finding is right.",),
    ),
    "outputs": About(
        "Outputs",
        "What do the two models predict on the same texts?",
        (
            "Intervals are over these texts; they say nothing of texts of another kind.",
            "The logit lens reads early layers through the last layer's norm and unembedding.",
        ),
    ),
    "interpolation": About(
        "Along and across the update",
        "How does behaviour change from base to tuned, and which layers of the update bring the change?",
        (
            "What a layer brings alone and what is lost without it need not agree, nor add up: layers interact.",
            "Without prompts, the texts are the models' own, and the measure is their log-probability.",
        ),
    ),
    "representations": About(
        "Representations",
        "How alike do the two models represent the same texts?",
        (
            "Similarity depends on the texts; without other seeds as a null, how much is much is not known.",
            "With fewer rows than features biased CKA is near 1 whatever the data.",
        ),
    ),
    "patching": About(
        "Activation patching",
        "Which places of one model's run restore the answer on the corrupted prompt?",
        (
            "Patching the residual stream at the last position late in the model restores the answer trivially.",
            "The effect of a place is of that place alone; places interact.",
        ),
    ),
    "cmap": About(
        "Patching across models",
        "Which heads of one model, put into the other's run on the same prompt, carry the difference?",
        (
            "A head can move the answer on any prompt; what counts is the effect beyond donors on another prompt.",
            "Attribution estimates are first-order; where both are there, the figure compares them.",
        ),
    ),
    "cot": About(
        "Chain of thought",
        "Do the answers depend on the chain of thought that is written before them?",
        (
            "Tests of one question file; a model may use its chain on harder questions only.",
            "High agreement on truncated chains shows that the chain is not needed, not that it is false.",
        ),
    ),
    "bias": About("Bias and hints", "Do hints move the answers, and do the chains say so?"),
    "inside_chains": About("Inside the chain", "Which steps do later steps and the answer depend on?"),
    "grafting": About(
        "Grafting",
        "Which few entries of the update carry what was learnt?",
        ("A graft fitted to prompts is judged on others; its size depends on the search.",),
    ),
    "task_vectors": About("Task vectors", "How alike are the updates of several models?"),
    "compression": About("Compression", "How few bits does the update need?"),
    "probing": About(
        "Probing",
        "At which depth can a label be read from each model's activations?",
        ("That something can be read does not show that it is used; compare with the control task.",),
    ),
    "pruning": About("Pruning", "Does removing a few weights bring back what the base could do?"),
    "revival": About("Revival", "How fast does a lost capability come back, beside models that never had it?"),
    "attention": About("Attention", "Where do the heads of the two models look?"),
    "directions": About("Directions", "Is a direction of the base still there, and does it still act?"),
    "recovery": About("Recovery on one axis", "How much has to move for the behaviour to move with it?"),
    "parts": About("Parts", "Do measures of the same matrices and heads agree?"),
    "trajectory": About("Trajectory", "How do intruder dimensions come and go along the run?"),
}
