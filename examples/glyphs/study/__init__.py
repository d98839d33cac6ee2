"""The label-noise study: what each margin does to a training set whose labels are partly wrong.

plan.py       what is trained: conditions, heads, seeds, schedules; names of runs
heads.py      margins, target gradients and what may mend the exact one
data.py       the training rows of a condition, and which of them are wrong
recorder.py   what an epoch looked like: angles and gradient of right and of wrong rows
training.py   one run, from its plan to its JSON
workers.py    runs side by side in processes of one thread each; a worker's side is `worker.py`
store.py      the folder of JSON files: atomic, resumable, never mixed with another configuration
choice.py     each head's scale and margin, chosen on validation
statistics.py paired differences and their intervals
tables.py, plots.py, report.py   what came out
"""
