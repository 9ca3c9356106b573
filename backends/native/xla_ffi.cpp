// The library's functions as XLA's FFI calls them: on XLA's own buffers, which are not copied.
// The build has no headers of jaxlib's. What is used of its C ABI is declared here; that part is the same in versions
// 0.1 (JAX 0.8) to 0.4 (JAX 0.11), and every struct begins with its size.

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "scan.h"
#include "steps.h"

namespace xla {

enum Type { INT64 = 5 };
enum Code { INVALID_ARGUMENT = 3, RESOURCE_EXHAUSTED = 8 };
enum { METADATA = 1, ARRAY = 1 };

struct Error;

struct Extension {
    size_t size;
    int32_t type;
    Extension *next;
};

struct Version {
    size_t size;
    Extension *extensions;
    int32_t major, minor;
};

struct Metadata {
    size_t size;
    Version version;
    uint32_t traits;
    int64_t state_type;
};

// Stands in the call that XLA makes at registration, to ask for what is then to be filled in.
struct MetadataExtension {
    Extension base;
    Metadata *metadata;
};

struct ErrorArguments {
    size_t size;
    Extension *extensions;
    const char *message;
    int32_t code;
};

struct Api {
    size_t size;
    Extension *extensions;
    Version version;
    const void *internal;
    Error *(*create_error)(ErrorArguments *);
};

struct Buffer {
    size_t size;
    Extension *extensions;
    int32_t type;
    void *data;
    int64_t rank;
    const int64_t *dims;
};

// The arguments or the results.
struct Buffers {
    size_t size;
    Extension *extensions;
    int64_t count;
    const int32_t *kinds;
    const Buffer *const *buffers;
};

struct Name {
    const char *text;
    size_t length;
};

struct Array {
    int32_t type;
    size_t count;
    const void *data;
};

struct Attributes {
    size_t size;
    Extension *extensions;
    int64_t count;
    const int32_t *kinds;
    const Name *const *names;
    const void *const *values;
};

struct CallFrame {
    size_t size;
    Extension *extensions;
    const Api *api;
    void *context;
    int32_t stage;
    Buffers arguments, results;
    Attributes attributes;
};

}  // namespace xla

using namespace xla;

// A function of the library by the address of `count` structs; 0, or 1 where there is not the memory.
typedef int32_t Function(const void *structs, int64_t count);

struct Words {
    int64_t count;
    const int64_t *data;
};

// That attribute, without elements where there is none such.
static Words read_words(const Attributes &attributes, const char *name) {
    for (int64_t k = 0; k < attributes.count; k++) {
        const Name &found = *attributes.names[k];
        if (found.length != strlen(name) || memcmp(found.text, name, found.length)) continue;
        const Array &array = *(const Array *)attributes.values[k];
        if (attributes.kinds[k] != ARRAY || array.type != INT64) break;
        return {(int64_t)array.count, (const int64_t *)array.data};
    }
    return {0, nullptr};
}

// The buffers' addresses in place of their numbers, which count the arguments and then the results. False where what is
// asked for is not there.
static bool place_buffers(const CallFrame &frame, int64_t *structs, int64_t size, const Words &pointers) {
    const Buffers &arguments = frame.arguments, &results = frame.results;
    for (int64_t k = 0; k < pointers.count; k++) {
        int64_t at = pointers.data[k];
        if (at < 0 || at >= size) return false;
        int64_t number = structs[at];
        if (number < 0 || number >= arguments.count + results.count) return false;
        bool given = number < arguments.count;
        const Buffer &buffer = given ? *arguments.buffers[number] : *results.buffers[number - arguments.count];
        memcpy(structs + at, &buffer.data, sizeof buffer.data);
    }
    return true;
}

static Error *error(const CallFrame &frame, int32_t code, const char *message) {
    ErrorArguments arguments = {sizeof arguments, nullptr, message, code};
    return frame.api->create_error(&arguments);
}

static Error *call(CallFrame &frame, Function run) {
    if (frame.extensions && frame.extensions->type == METADATA) {
        Metadata &metadata = *((MetadataExtension *)frame.extensions)->metadata;
        metadata.version.major = 0;
        metadata.version.minor = 1;
        return nullptr;
    }
    Words words = read_words(frame.attributes, "structs"), pointers = read_words(frame.attributes, "pointers");
    Words count = read_words(frame.attributes, "count");
    // Calls may run at the same time, each on buffers of its own.
    int64_t *structs = (int64_t *)malloc(sizeof(int64_t) * words.count + 1);
    if (!structs) return error(frame, RESOURCE_EXHAUSTED, "no memory for the arguments of a native kernel");
    if (words.count) memcpy(structs, words.data, sizeof(int64_t) * words.count);
    bool fits = words.count && pointers.count && count.count == 1;
    fits = fits && place_buffers(frame, structs, words.count, pointers);
    int32_t failed = fits && run(structs, *count.data);
    free(structs);
    if (!fits) return error(frame, INVALID_ARGUMENT, "a native kernel was called with other arguments than it takes");
    return failed ? error(frame, RESOURCE_EXHAUSTED, "no memory for the workspace of a native kernel") : nullptr;
}

// Handlers of XLA's typed FFI, of any arguments and results. Attributes, all arrays of int64: `structs`, those that the
// function takes, with the number of a buffer for its address; `pointers`, which words of it these are; `count`, of
// structs. That shapes and dtypes are what the structs say is for the caller to see to.
#define HANDLER(name, type, run)                                                                     \
    EXPORT Error *name(CallFrame *frame) {                                                           \
        return call(*frame, [](const void *structs, int64_t) { return run((const type *)structs); }); \
    }

HANDLER(mamba_scan_forward_xla, Scan, mamba_scan_forward)
HANDLER(mamba_scan_backward_xla, Scan, mamba_scan_backward)
HANDLER(mamba_ssd_forward_xla, Ssd, mamba_ssd_forward)
HANDLER(mamba_ssd_backward_xla, Ssd, mamba_ssd_backward)
HANDLER(mamba_conv_forward_xla, Conv, mamba_conv_forward)
HANDLER(mamba_conv_backward_xla, Conv, mamba_conv_backward)
HANDLER(mamba_linear_step_xla, LinearStep, mamba_linear_step)
HANDLER(mamba_experts_step_xla, ExpertsStep, mamba_experts_step)

// The same for a function that takes several structs.
#define HANDLER_OF_SEVERAL(name, type, run)                           \
    EXPORT Error *name(CallFrame *frame) {                            \
        return call(*frame, [](const void *structs, int64_t count) {  \
            return run((const type *)structs, count);                 \
        });                                                           \
    }

HANDLER_OF_SEVERAL(mamba_mamba_steps_xla, MambaStep, mamba_mamba_steps)
HANDLER_OF_SEVERAL(mamba_ssd_steps_xla, SsdStep, mamba_ssd_steps)
