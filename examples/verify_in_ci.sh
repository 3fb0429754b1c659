#!/bin/sh
# A gate for continuous integration: it ends with a status other than 0 where the targets of this machine do not compute, spike by spike, what the artefact says.
# Keep the .fsnn file with your code, and run: sh examples/verify_in_ci.sh network.fsnn
set -eu
artefact=${1:?name a .fsnn file, made by: toolchain compile MODEL -o network.fsnn}
targets=${2:-reference,sim}

toolchain verify "$artefact" --replay --targets "$targets"                                # the inputs and spike counts kept in the file itself
toolchain verify "$artefact" --targets "$targets" --dataset "${3:-digits}" --samples 10   # every spike and potential on images; 4 where one differs
