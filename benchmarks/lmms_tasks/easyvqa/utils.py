"""easy-VQA as a task of lmms-eval, from the package that brings it: a document is a question, in the order of
`voco_jax.evaluate`, whose prompts and score these are."""

from datasets import Dataset, DatasetDict
from lmms_eval.api.task import ConfigurableTask

from voco_jax.data.images import load_image
from voco_jax.data.sources import easyvqa
from voco_jax.data.turns import text_of
from voco_jax.eval.scoring import normalize

ANSWERS = (
    "black", "blue", "brown", "gray", "green", "red", "teal", "yellow", "circle", "rectangle", "triangle", "no", "yes",
)  # fmt: skip


class EasyVqa(ConfigurableTask):
    """Its documents are made here: nothing is downloaded."""

    def __init__(self, config: dict):
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def download(self, dataset_kwargs=None) -> None:
        questions = [
            {
                "picture": str(record.images[0].file), "question": question, "answer": turns[1]["value"],
                "kind": easyvqa.question_kind(question),
            }
            for record in easyvqa.load("test")
            for turns in record.conversations
            for question in [text_of(turns[0]["value"])]
        ]  # fmt: skip
        self.dataset = self.dataset_no_image = DatasetDict({"test": Dataset.from_list(questions)})


def doc_to_visual(doc):
    return [load_image(doc["picture"])]


def doc_to_choice(doc):
    return list(ANSWERS)


def doc_to_number(doc):
    return ANSWERS.index(doc["answer"])


def process_results(doc, results):
    is_right = normalize(results[0]) == normalize(doc["answer"])
    return {"accuracy": float(is_right)}
