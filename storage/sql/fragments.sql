-- Fragments that statements of more than one file share. A statement names one as {name}.

-- fragment: utc_now
-- The moment as Optuna's tables keep it: UTC, without a time zone.
clock_timestamp() AT TIME ZONE 'UTC'

-- fragment: this_call
-- The row of hpo.calls that this very call has left, if an earlier try of it was committed.
client = %(client)s AND call = %(call)s

-- fragment: claim
-- The end of an INSERT INTO hpo.calls: the call happens once, as its row is replaced by later calls only.
ON CONFLICT (client) DO UPDATE SET call = excluded.call, result = excluded.result, called_at = now()
WHERE calls.call < excluded.call

-- fragment: out_of_time
-- Whether the study's wall-clock budget is spent.
coalesce(deadline <= clock_timestamp(), false)
