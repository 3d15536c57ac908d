//! Rollouts on a real cluster, which `cargo xtask cluster run` has started.
//!
//! What users of other tools complain about, and what shows that it is otherwise here:
//!
//! | complaint | issues | test |
//! |---|---|---|
//! | no data, or NaN, becomes a verdict | argo-rollouts 1466, 1905, 3503, 4479; flagger 883, 1035, 1689 | [`prometheus`], `rollout::prometheus` |
//! | the configuration stays when the image goes back | argo-rollouts 958, 1297, 2669 | `rollouts::behind_a_gateway`, `rollouts::a_release_may_change_only_its_secret` |
//! | migrations have no place | flagger 555, 1186 | `troubles::a_migration_that_fails_ends_the_rollout` |
//! | stable is too small when it gets the traffic back | argo-rollouts 3020, 3372, 3888, 3926, 4347, 4595, 4828 | `side_by_side`, `rollouts::behind_a_plain_service` |
//! | the way back leads to something broken | flagger 1898 | `troubles::what_others_do_to_stable_is_waited_for` |
//! | an autoscaler gets in the way | argo-rollouts 1415, 2857, 3849, 4973 | `troubles::the_candidate_follows_an_autoscaler` |
//! | it fights with somebody without an end, or is stuck | argo-rollouts 1904, 2522, 3080 | `troubles::what_is_undone_each_time_is_not_fought_over`, `troubles::two_operators_do_not_fight` |
//! | what will never run is waited for | argo-rollouts 2863, 3765, 4128; helm 7429 | `troubles::an_image_that_cannot_be_pulled_is_no_long_wait`, `troubles::a_release_that_crashes_shows_its_last_words` |
//! | a killed client leaves a lock behind | helm 4558, 7476 | `rollouts::a_killed_rollout_is_resumed_from_elsewhere`, `faults::who_was_cut_off_and_replaced_changes_nothing` |
//! | no abort by hand, and no quick way back after promotion | flagger 413, 453, 724, 862, 1310 | `troubles::an_abort_is_heard_while_a_job_is_waited_for`, `rollouts::a_kept_release_is_gone_back_to_at_once` |
//! | after an undo the next apply does something else | kubectl 1297, 1301, 1302 | `faults::every_fault_at_every_call`, which rolls out again after a rollback |
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[expect(dead_code, reason = "some of it is for the sandbox only")]
#[path = "../commands/fixture.rs"]
mod fixture;
mod namespace;
mod proxy;

mod faults;
mod manifests;
mod policies;
mod prometheus;
mod rights;
mod rollouts;
mod side_by_side;
mod troubles;
mod webhook;
