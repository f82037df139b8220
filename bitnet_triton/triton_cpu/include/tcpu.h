// Everything that the generated code uses.
#pragma once
#include "types.h"
#include "maths.h"
#include "libdevice.h"
#include "atomics.h"
#include "vector.h"
#include "reduce.h"
#include "dot.h"
