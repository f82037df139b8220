// The functions of CUDA's libdevice that have a meaning on a CPU, as ld_<name>.
#pragma once
#include "maths.h"
