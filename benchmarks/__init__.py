"""Measurements of the library, each a command: `python -m benchmarks.NAME` from the clone.

quickstart: what the README's first command costs and gives.
step_memory: memory and traffic of a training step, as compilers for GPUs and TPUs plan them.
largest_batch: the largest batch whose plan fits a device.
confirm_plan: what a device takes and how long a step lasts, beside its plan.
step_time: time of a training step, beside BatchNorm's.
folded_inference: time of folded inference, and what exported files hold.
profile_step: where the time of a training step goes.
input_pipeline: how much of training is not the training step.
streaming: how fast images are read and decoded (_streaming: what is measured; _torch_loader: what a user of PyTorch
    would run).
fault_injection: interrupted runs and corrupted checkpoints.
sharpness: the largest eigenvalue of the curvature, learning rates, and what BatchNorm does to both (_sharpness: the
    networks, and one record).
large_steps: what large steps do, with BatchNorm and without.
fixed_norm: LAWN and Hyperball beside plain optimizers.
trainability: condition of the tangent kernel and growth of perturbations at initialization.
ntk.compare: the tangent kernel beside neural_tangents' (ntk.cases: the networks, and one process that evaluates them).
ntk.digits: regression with tangent kernels on the digits, and alignment along the default run.
ntk.families: how the tangent kernel of each family of networks is computed, against its Jacobian.
paper.reproduce: the paper's tables and figures, and small networks trained to the end (paper.experiments: what they
    are; paper.comparison, paper.convergence, paper.pages: their pages; paper.paired: differences by seed).
paper.calibration: calibration of a finished run.
render: every page of results/ and every table of results in README.md and docs/, from the records.

Not commands:
baselines: the same networks as users would otherwise run them.
tables: the tables of results in README.md and docs/.
_results: records, what tells them apart, what they were measured on, Markdown tables.
_process: measuring in a fresh process.
"""
