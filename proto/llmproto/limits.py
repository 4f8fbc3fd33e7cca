"""Every bound of the system, each with its reason.

A number stands here once; the schema, the kernel and the services read it from here. What
happens at a bound is always an early typed refusal or stopped reading (credit), never growth.
"""

from typing import Final

# the version that this schema describes; it grows only when readers of the last would break
PROTOCOL_VERSION: Final = 1

# --- frames ---------------------------------------------------------------------------
# all frames together; bounds a context, keeps one sender from filling a pipe
MESSAGE_BYTES_MAX: Final = 1 << 20
# the largest legal header is under 1 KB; the rest is room for traces
HEADER_BYTES_MAX: Final = 4096
BLOBS_MAX: Final = 64  # frames behind the body
LEFT_OUT_MAX: Final = 100  # names of an imported folder's files: more are not read
NAME_BYTES_MAX: Final = 256  # model, service and key names: they appear in tables and file names
# what CURVE adds to a frame is 33 bytes: a message of the largest size must pass encrypted too
SEALED_FRAME_BYTES_MAX: Final = MESSAGE_BYTES_MAX + 64
DETAIL_BYTES_MAX: Final = 4096  # error text for people
PATH_BYTES_MAX: Final = 4096  # PATH_MAX on Linux

# --- generation -----------------------------------------------------------------------
TOKEN_ID_MAX: Final = (1 << 24) - 1  # vocabularies stay far below 16 million
# what one message can carry at 4 bytes a token, with room to spare
CONTEXT_TOKENS_MAX: Final = 190_000
# the text of a prompt or of all chat messages; the rest of the message is overhead
PROMPT_BYTES_MAX: Final = 900_000
CHOICES_MAX: Final = 128  # `n` of one request; OpenAI's own limit
STOPS_MAX: Final = 16  # stop strings of one request
STOP_BYTES_MAX: Final = 256  # one stop string: bounds the text held back while it may still match
LOGPROBS_MAX: Final = 20  # alternatives a position; OpenAI's own limit
LOGIT_BIASES_MAX: Final = 1024  # each costs one addition at every step
SINK_STATE_BYTES_MAX: Final = 16_384  # 16 stops of 256 bytes, and names
CREDIT_TOKENS: Final = 256  # tokens a thread may run beyond what its client has consumed
# steps an executor may run beyond the watermark: hides one journal turn, bounds rework
STEPS_AHEAD_MAX: Final = 8

# --- jobs ---------------------------------------------------------------------------
# inputs of one call: their vectors, at 4096 floats each, must fit one message
ENCODE_INPUTS_MAX: Final = 32
RECIPE_BYTES_MAX: Final = 262_144  # inline label lists and templates, never data
JOB_PROCESSES_MAX: Final = 64  # ranks of one job on one machine: more than it has devices
JOBS_MAX: Final = 1024  # living and remembered; an ended one is kept for JOB_KEPT_MS
JOB_KEPT_MS: Final = 86_400_000  # people look next morning how the night's run ended
# reports kept of one job beyond its checkpoint: they go out in one JobRun, 100 bytes each
JOB_REPORTS_MAX: Final = 4096
# beside the reports, what their metrics may take of one JobRun; the recipe is the rest
JOB_METRICS_BYTES_MAX: Final = 262_144
# reports kept for who looks in late: one answer's worth
JOB_REPORTS_KEPT: Final = 1024
# a job that dies so often by itself without a new checkpoint or a new step is given up
JOB_DEATHS_MAX: Final = 5
# the same, whatever ended it: an outside hand, or memory that nobody counted
JOB_LOSSES_MAX: Final = 50
# a job's process that was told to run and computes no micro-batch for so long is dead, unless it
# said Working: the largest model that a processor trains takes seconds for one
JOB_SILENT_MS: Final = 60_000
# a job's process without a beat for so long is dead: it runs nice, and comes late on busy cores
JOB_BEAT_SILENT_MS: Final = 15_000
JOB_STOPPING_MS: Final = 60_000  # from JobPace(stop) to SIGTERM: a large checkpoint is written
# a started on-demand service that nobody has asked for so long is stopped
SERVICE_IDLE_MS: Final = 300_000
DATA_PROBLEMS_MAX: Final = 20  # malformed rows that a report quotes

# --- tables ---------------------------------------------------------------------------
# connections of one kernel: file descriptors are 20,000 on a stock server
SESSIONS_MAX: Final = 4096
THREADS_MAX: Final = 16_384  # accepted and not forgotten; about 1 KB each without its tokens
THREADS_PER_TENANT_MAX: Final = 4096  # one tenant cannot take the whole table
CONTEXT_TOKENS_TOTAL_MAX: Final = 64_000_000  # tokens held by all contexts: 256 MB at 4 bytes
REQUESTS_IN_FLIGHT_MAX: Final = 4096  # unanswered requests of one session
# request keys remembered after their threads are forgotten: about 200 bytes each
KEYS_SPENT_MAX: Final = 65_536
# requests remembered because a service died with them: 16 bytes and a reason each
SUSPECT_REQUESTS_MAX: Final = 1024
PROCESSES_MAX: Final = 256  # one machine; init looks through them at every exit
MODELS_MAX: Final = 1024  # a reply that lists them, with ordinary paths, fits a message
API_KEYS_MAX: Final = 4096  # a reply that lists them with short names fits one message
TENANTS_MAX: Final = 8192  # one for each key, and as many again for local users

# --- times ----------------------------------------------------------------------------
BEAT_MS: Final = 500  # every peer's heartbeat
SESSION_LEASE_MS: Final = 2_000  # a session without a beat for so long is gone
# a service without a beat for so long is dead (a stopped one, say)
SERVICE_SILENT_MS: Final = 2_000
PING_MS: Final = 1_000  # ZeroMQ's own heartbeat, over tcp: a broken network says nothing
PING_SILENT_MS: Final = 3_000  # a tcp connection on which nothing came for so long is made anew
KERNEL_SILENT_MS: Final = 2_000  # init kills a kernel that has not beaten for so long
# an executor that holds work and commits nothing for so long is dead, unless it said Working
STEP_BUDGET_MS: Final = 2_000
# the longest budget that Working may ask for: loading the largest models from slow disks
WORKING_MS_MAX: Final = 600_000
STARTING_MS_MAX: Final = 60_000  # from fork to Hello
STOPPING_MS_MAX: Final = 2_000  # from SIGTERM to SIGKILL
# a Run that its executor does not list as held after so long is sent again
RUN_RESEND_MS: Final = 1_000
# commits that their sink does not list as received after so long are sent again
SINK_RESEND_MS: Final = 1_000
# a client repeats an unanswered request after so long, with the same key
REQUEST_RETRY_MS: Final = 2_000
# a client asks again for a stream on which nothing came for so long
STREAM_SILENT_MS: Final = 2_000
LINGER_MS: Final = 30_000  # a resumable thread whose client is gone keeps its place for so long
RESUME_MS_MAX: Final = 600_000  # ended contexts and request keys are kept for so long
MODEL_IDLE_MS: Final = 900_000  # a model without threads for so long is unloaded
SYNC_MS: Final = 20  # group sync of the journal
ACK_MS: Final = 100  # consumers acknowledge at most this often, unless half the credit is used

# --- failures -------------------------------------------------------------------------
STRIKES_MAX: Final = 2  # self-made deaths alone at one position that end a thread
ALONE_DEATHS_MAX: Final = 6  # self-made deaths alone, at any position, that end a thread
# restarts of one role within RESTART_WINDOW_MS before quarantine (attributed deaths not
# counted)
RESTARTS_MAX: Final = 8
RESTART_WINDOW_MS: Final = 10_000  # long enough for several starts to fail, short to forgive
BACKOFF_MS_FIRST: Final = 50  # after the second death in the window; doubles
BACKOFF_MS_MAX: Final = 2_000  # a repaired fault is noticed within seconds
QUARANTINE_MS: Final = 30_000  # a role that exceeded its intensity is tried again after so long

# --- journal --------------------------------------------------------------------------
SEGMENT_BYTES: Final = 4 << 20  # preallocated: one allocation in some 100,000 commits
# kept free so that ends and acknowledgements fit when admissions stop
JOURNAL_RESERVE_BYTES: Final = 1 << 20
RECORD_BYTES_MAX: Final = 2 << 20  # one fact: the largest is a thread with its whole context
